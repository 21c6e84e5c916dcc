"""What every test relies on."""

import signal

# A shell starts background jobs with SIGINT and SIGQUIT ignored, nohup adds SIGHUP, and programs inherit that: the
# tests that send these signals would then test nothing.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)
