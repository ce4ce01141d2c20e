"""``python -m dlrm`` is ``dlrm``."""

from dlrm.cli import main

if __name__ == "__main__":
    main()
