"""The typed HTTP client of the control plane, and the finding or starting of the local server.

Owns how a caller reaches a server: settings, retries, the resuming event stream, verified downloads.
Knows nothing of terminals, and nothing of what the server does behind its API.
"""
