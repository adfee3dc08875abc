"""The seeded commands that make every shipped weight of the embedded world from nothing.

``python -m sqdf_fast.shapes.build <part>``, in the order vae, unet, judge, taste; samples and sheet look at the
outcome. Each prints its seed, progress, outcome and duration.
"""
