"""Lines of upstream's documentation beside this project's commands, and what came of running them."""
