"""`python -m c2r` is `c2r`."""

from c2r.cli import main

if __name__ == "__main__":
    main()
