"""The `flash` command: one file per command group.

Owns words, tables and exit codes. Everything it knows it reads from files of the caller or asks the server
through `flash.client`; it trains nothing, opens no database, and imports nothing heavy before it must.
"""
