"""Parts of tools/setup_env.py: they run before there is an environment, with the standard library only."""
