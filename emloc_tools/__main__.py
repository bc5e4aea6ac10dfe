"""`python -m emloc_tools` is `emloc-tools`."""

from emloc_tools.cli import main

if __name__ == "__main__":
    main()
