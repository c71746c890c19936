// Package notify is a flag that one goroutine sets and another waits for.
package notify

// Flag is a channel that has a value while the flag is set. Receiving from it clears the flag. Make it with New.
type Flag chan struct{}

// New returns a flag that is not set.
func New() Flag { return make(Flag, 1) }

// Set sets the flag; setting one that is set changes nothing.
func (f Flag) Set() {
	select {
	case f <- struct{}{}:
	default:
	}
}
