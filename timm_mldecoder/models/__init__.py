"""ML-Decoder heads, cosine and graph classifiers, and attention maps on timm models."""

# Options of `timm.create_model` that choose a classifier of this package, described by `factory.CLASSIFIERS`. They are
# here because the plug-in needs the names before torch and timm are imported.
CLASSIFIER_OPTIONS = ('ml_decoder', 'cosine_classifier', 'graph_classifier', 'probe_head')
