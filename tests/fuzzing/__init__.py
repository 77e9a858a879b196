"""Generated inputs for the commands and readers: none may give a traceback, hang, or leave a trace.

    python -m tests.fuzzing --examples 1000

`subjects` says what is generated and what is done with it, `mutations` how an input that works
becomes one that may not, `campaign` what counts as a failure.
"""
