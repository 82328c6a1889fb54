"""`python -m robudget …`, which is also what `torchrun -m robudget run …` starts."""

from robudget.cli import main

if __name__ == "__main__":
    main()
