"""`python -m lift_ds.doctor`, which any launcher can start as its ranks."""

import sys

from lift_ds.doctor.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
