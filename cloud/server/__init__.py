"""The server: an aiohttp application over one engine for each workgroup."""
