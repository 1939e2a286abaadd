"""Runs the command line on the simulated engine, for tests that need a process of its own."""

import sys

import fake_engine

from edgelm_apps.cli import main

if __name__ == "__main__":
    fake_engine.install()
    sys.exit(main())
