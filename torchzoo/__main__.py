import sys

from torchzoo.cli.app import main

sys.exit(main())
