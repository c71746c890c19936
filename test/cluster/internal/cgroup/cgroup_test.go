package cgroup

import (
	"reflect"
	"testing"
)

func TestHierarchiesAreFoundHoweverTheyAreMounted(t *testing.T) {
	for name, test := range map[string]struct {
		mountinfo string
		want      []Hierarchy
	}{
		"only unified": {
			mountinfo: `29 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev shared:4 - cgroup2 cgroup2 rw,nsdelegate
`,
			want: []Hierarchy{{Mount: "/sys/fs/cgroup"}},
		},
		"version 1 with the unified one beside it, as systemd mounts them": {
			mountinfo: `23 28 0:21 / /sys rw - sysfs sysfs rw
30 23 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,name=systemd
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw
`,
			want: []Hierarchy{
				{Mount: "/sys/fs/cgroup/unified"},
				{Mount: "/sys/fs/cgroup/systemd", Options: []string{"name=systemd"}},
				{Mount: "/sys/fs/cgroup/cpu,cpuacct", Options: []string{"cpu", "cpuacct"}},
			},
		},
		"mounted twice, and a part of it bound elsewhere": {
			mountinfo: `29 23 0:26 /a /mnt rw - cgroup2 cgroup2 rw
30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw
31 23 0:26 / /again rw - cgroup2 cgroup2 rw
`,
			want: []Hierarchy{{Mount: "/sys/fs/cgroup"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := parseMounts(test.mountinfo); !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %+v\nwant %+v", got, test.want)
			}
		})
	}
}
