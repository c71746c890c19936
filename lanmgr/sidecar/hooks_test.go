package sidecar

import (
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestHookOutputAndTimeout(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	for _, c := range []struct {
		script, want string
		timeout      time.Duration
	}{
		{`test "$IFACE-$GIVEN" = lan0-before`, "", time.Minute},
		{`echo it is "
" so; exit 3`, "hook up: exit status 3: it is so", time.Minute},
		{
			`echo waits; sleep 600 & wait`,
			"hook up: took longer than 100ms and was killed (hooks.timeout): waits", 100 * time.Millisecond,
		},
	} {
		h := Hooks{Up: []string{"sh", "-c", c.script}, Timeout: Duration(c.timeout)}
		environment := []string{"PATH=/bin:/usr/bin", "GIVEN=before"}
		err := runHook(t.Context(), log, "up", h, h.Up, environment, "IFACE=lan0")
		if (err == nil) != (c.want == "") || err != nil && err.Error() != c.want {
			t.Errorf("%s: %v, want %q", c.script, err, c.want)
		}
	}
	h := Hooks{Up: []string{"/no/such/program"}, Timeout: Duration(time.Minute)}
	err := runHook(t.Context(), log, "up", h, h.Up, nil)
	if err == nil || !strings.HasPrefix(err.Error(), "hook up: ") {
		t.Errorf("a program that does not exist: %v", err)
	}
}
