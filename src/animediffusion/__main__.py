"""`python -m animediffusion VERB` is the same as `animediffusion VERB`."""

from animediffusion.cli import main

if __name__ == "__main__":
    main()
