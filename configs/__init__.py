"""One recipe a file: get_config(variant) gives the settings of an experiment, at CPU size by default."""
