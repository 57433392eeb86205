"""The commands: load, one API call, save, print."""

from ditas_export.cli.first_signals import end_at_once_when_interrupted

end_at_once_when_interrupted()  # before what takes time to import
