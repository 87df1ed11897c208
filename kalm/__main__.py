"`python -m kalm` is the command `kalm`."
import sys

from kalm.run.command import main

sys.exit(main())
