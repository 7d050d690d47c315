"""Pages over the HTTP API: what a person sees of runs, samples, environments and models in a browser.

Plain files under `static/`, written for browsers as they are: no build step, nothing from outside. `site` finds them.
"""
