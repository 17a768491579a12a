"""`python -m animediffusion VERB` is the same as `animediffusion VERB`."""

from animediffusion.cli.app import main

if __name__ == "__main__":
    main()
