"""`python -m calm_ray`: the same as the `calm-ray` console script."""

import sys

from calm_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
