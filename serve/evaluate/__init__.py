"""Average precision of a served model on a data set, by upstream's own metrics, beside that of the native model."""
