# its own class
print('changed')
