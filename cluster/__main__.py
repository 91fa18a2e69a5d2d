"""``python -m cluster status|log|stop|list``."""

from __future__ import annotations

import sys

from cluster.command_line import afterwards


def main() -> int:
    try:
        return afterwards(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
