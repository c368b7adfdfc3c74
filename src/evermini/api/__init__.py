"""The HTTP face: routes, wire schemas, authentication, limits, errors and server-sent events."""
