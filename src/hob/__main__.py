"""`python -m hob` is `hob`."""

from hob.cli.main import main

if __name__ == "__main__":
    main()
