"""``python -m longskip.launcher``: the command line, for launchers that start modules."""

from longskip.launcher.cli import main

if __name__ == "__main__":
    main()
