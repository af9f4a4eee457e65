"""Temporary: helper C replaces this file."""

from calm_ray.report import RoundCounts


def round_facts(tally):
    c = RoundCounts.model_fields
    d = {}
    for k, v in tally.by_outcome.items():
        k = k if k in c else "failed"
        d[k] = d.get(k, 0) + v
    return {
        "rounds": RoundCounts(**d),
        "last_group_size": tally.last_group_size,
        "samples_contributed": tally.samples_averaged,
    }
