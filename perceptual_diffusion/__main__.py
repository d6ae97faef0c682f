"""`python -m perceptual_diffusion`, also as `accelerate launch -m perceptual_diffusion train CONFIG`."""

from perceptual_diffusion.cli import main

if __name__ == "__main__":
    main()
