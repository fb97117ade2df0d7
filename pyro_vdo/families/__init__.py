"""The dropout family: priors, posteriors, guides and layers beyond the weight with its own Normal."""
