"""`python -m servegym`: the program `servegym`, where its script is not on the path."""

from servegym.cli import main

if __name__ == "__main__":
    main()
