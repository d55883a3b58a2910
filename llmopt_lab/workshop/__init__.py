"""What an instructor needs around the course: an agenda, a bundle for students, static pages.

    llmopt syllabus --minutes 240    an agenda; with --out the class's notebooks, notes and slides
    llmopt release FOLDER            the course without solutions and notes
    llmopt site FOLDER               static pages in which the players still play

Like cli.py and build.py it stands above everything else. Only `catch_up` is for notebooks.
"""
