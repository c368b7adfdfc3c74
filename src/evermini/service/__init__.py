"""What the routes and the command line call: chat and completions, free of HTTP."""
