"""`python -m mambastyle` is `mambastyle`, for torchrun."""

from mambastyle.cli import main

if __name__ == "__main__":
    main()
