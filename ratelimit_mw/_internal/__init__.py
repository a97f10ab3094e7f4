"""Private parts of the package: users import from `ratelimit_mw` and from the modules beside this folder."""
