"""`python -m loraplus_hydra`."""

from loraplus_hydra.cli.main import main

if __name__ == "__main__":
    main()
