import sys

try:
    from .cli import main

    code = main()
except KeyboardInterrupt:  # while modules are imported: `main` ends with the same code
    code = 130
sys.exit(code)
