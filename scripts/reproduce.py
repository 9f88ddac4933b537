"""Trains runs of the published Table 5 again and compares them with their committed records; --help has options."""

from viladiff.cli.reproduce import main

if __name__ == "__main__":
    raise SystemExit(main())
