"""Anonymous battles of two models, the votes on them, and the ratings that follow."""
