"""MMDetection's and MMDetection3D's own tools on the present torch and numpy: training, testing, data, logs.

`patches` corrects upstream's code when its modules are imported, `tools` runs upstream's files from the installed
wheels, and the other modules replace those tools that are wrong or dead.
"""
