"""What went wrong and can be mended by the user; the command line turns this, and nothing else, into a sentence."""


class UserError(Exception):
    """Base of every error that a user can mend: the message names the file or setting, and the remedy.

    Whatever is raised beside it is a fault of ours, or of the machine, and keeps its traceback.
    """
