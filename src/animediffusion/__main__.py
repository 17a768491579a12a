"""Run the command line: `python -m animediffusion COMMAND` is the same as `animediffusion COMMAND`."""

from animediffusion.cli.app import main

if __name__ == "__main__":
    main()
