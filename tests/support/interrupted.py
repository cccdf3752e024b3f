"""A command line that gets Ctrl-C at a given moment."""

# Interrupts itself at the first report of a stage: as close to the stage as can be.
INTERRUPTED = """
import os, signal, sys
import tpirt.chat.progress as module

class Interrupting(module.ConsoleProgress):
    def __call__(self, progress):
        if progress.stage == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
        super().__call__(progress)

module.ConsoleProgress = Interrupting
from tpirt.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
