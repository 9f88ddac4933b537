"""Which λ of Eq. 1, and how sure are we? ``--help`` has examples."""

from pathlib import Path

from viladiff.cli.sweeps import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).with_name("sweep_lambda.toml")))
