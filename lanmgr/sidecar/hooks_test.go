package sidecar

import (
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestHooks(t *testing.T) {
	for _, c := range []struct {
		script, want string
		timeout      time.Duration
	}{
		{`test "$IFACE-$GIVEN" = lan0-before`, "", time.Minute},
		{`echo it is "
" so; exit 3`, "hook up: exit status 3: it is so", time.Minute},
		{`echo waits; sleep 600 & wait`, "hook up: took longer than 100ms and was killed (hooks.timeout): waits", 100 * time.Millisecond},
	} {
		h := Hooks{Up: []string{"sh", "-c", c.script}, Timeout: Duration(c.timeout)}
		err := runHook(t.Context(), slog.New(slog.DiscardHandler), "up", h, h.Up, []string{"PATH=/bin:/usr/bin", "GIVEN=before"}, "IFACE=lan0")
		if (err == nil) != (c.want == "") || err != nil && err.Error() != c.want {
			t.Errorf("%s: %v, want %q", c.script, err, c.want)
		}
	}
	h := Hooks{Up: []string{"/no/such/program"}, Timeout: Duration(time.Minute)}
	if err := runHook(t.Context(), slog.New(slog.DiscardHandler), "up", h, h.Up, nil); err == nil || !strings.HasPrefix(err.Error(), "hook up: ") {
		t.Errorf("what is not there: %v", err)
	}
}
