package chart

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

var update = flag.Bool("update", false, "write docs/rights.md")

const rightsPage = "../../docs/rights.md"

// accounts are k8slan's service accounts in the order of the page, each with the program that uses it.
var accounts = []struct{ name, who string }{
	{"k8slan-node", "The daemon on every node."},
	{"k8slan-controller", "The controller."},
	{"k8slan-test", "The job of `helm test`. It exists only while the test runs."},
	{"k8slan-upgrade", "The job of `helm upgrade`. It exists only while the upgrade runs."},
	{"k8slan-uninstall", "The jobs of `helm uninstall`. It exists only while they run."},
	{"k8slan-residue", "The last step of `helm uninstall`. It removes itself within minutes."},
}

func TestRightsPageMatchesChart(t *testing.T) {
	want := rights(t, renderAll(t))
	if *update {
		if err := os.WriteFile(rightsPage, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(rightsPage)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != want {
		t.Error("docs/rights.md differs from the rights in the chart: run make generate")
	}
}

// rights returns the text of the page.
func rights(t *testing.T, objects []unstructured.Unstructured) string {
	t.Helper()
	var page strings.Builder
	page.WriteString(`# Rights

This page lists what k8slan's service accounts may do in the cluster. It is generated from the chart
(` + "`make generate`" + `). No rule has a wildcard, and none allows access to Secrets.
`)
	granted := map[string][]string{}
	for _, o := range objects {
		if !strings.HasSuffix(o.GetKind(), "Binding") || o.GroupVersionKind().Group != rbacv1.GroupName {
			continue
		}
		binding := convert[rbacv1.ClusterRoleBinding](t, o)
		where := "cluster"
		if o.GetKind() == "RoleBinding" {
			where = "`" + o.GetNamespace() + "`"
		}
		rules := roleOf(t, objects, binding.RoleRef, o.GetNamespace())
		for _, subject := range binding.Subjects {
			granted[subject.Name] = append(granted[subject.Name], rows(rules, where)...)
		}
	}
	for _, o := range objects {
		if o.GetKind() == "ServiceAccount" && !slices.ContainsFunc(accounts,
			func(a struct{ name, who string }) bool { return a.name == o.GetName() }) {
			t.Errorf("service account %s is missing from the list of accounts in this test", o.GetName())
		}
	}
	for _, a := range accounts {
		fmt.Fprintf(&page, "\n## %s\n\n%s\n\n| resource | verbs | where |\n|---|---|---|\n", a.name, a.who)
		for _, row := range granted[a.name] {
			page.WriteString(row)
		}
		delete(granted, a.name)
	}
	for name := range granted {
		t.Errorf("rights are bound to service account %s, which the chart does not have", name)
	}
	page.WriteString("\n## For users\n\nThe chart adds to Kubernetes' own roles. `edit` includes `view`, and `admin` " +
		"includes `edit`.\n\n" +
		"| role | resource | verbs |\n|---|---|---|\n")
	for _, o := range objects {
		for label := range o.GetLabels() {
			if role, ok := strings.CutPrefix(label, "rbac.authorization.k8s.io/aggregate-to-"); ok {
				for _, rule := range convert[rbacv1.ClusterRole](t, o).Rules {
					fmt.Fprintf(&page, "| `%s` | %s | %s |\n", role, resources(rule), strings.Join(rule.Verbs, ", "))
				}
			}
		}
	}
	page.WriteString("\n## Beyond RBAC\n\nValidatingAdmissionPolicies refuse what RBAC cannot. They run in the API " +
		"server; k8slan has no webhook." +
		"\n\n| policy | what it refuses |\n|---|---|\n")
	for _, o := range objects {
		if o.GetKind() != "ValidatingAdmissionPolicy" {
			continue
		}
		refuses := o.GetAnnotations()["lan.k8slan.io/refuses"]
		if refuses == "" {
			t.Errorf("policy %s lacks the annotation lan.k8slan.io/refuses, which says what it refuses", o.GetName())
		}
		fmt.Fprintf(&page, "| `%s` | %s |\n", o.GetName(), refuses)
	}
	return page.String()
}

// roleOf returns the rules of the role that a binding refers to.
func roleOf(t *testing.T, objects []unstructured.Unstructured, ref rbacv1.RoleRef,
	namespace string,
) []rbacv1.PolicyRule {
	t.Helper()
	for _, o := range objects {
		if o.GetKind() == ref.Kind && o.GetName() == ref.Name &&
			(ref.Kind == "ClusterRole" || o.GetNamespace() == namespace) {
			return convert[rbacv1.ClusterRole](t, o).Rules
		}
	}
	t.Fatalf("the chart has no %s %s", ref.Kind, ref.Name)
	return nil
}

// rows returns the lines of a table of rules.
func rows(rules []rbacv1.PolicyRule, where string) []string {
	var lines []string
	for _, rule := range rules {
		lines = append(lines, fmt.Sprintf("| %s | %s | %s |\n", resources(rule), strings.Join(rule.Verbs, ", "), where))
	}
	return lines
}

// resources returns the names of a rule's resources.
func resources(rule rbacv1.PolicyRule) string {
	var names []string
	for _, group := range rule.APIGroups {
		for _, resource := range rule.Resources {
			name := resource
			if group != "" {
				name += "." + group
			}
			names = append(names, "`"+name+"`")
		}
	}
	text := strings.Join(names, ", ")
	if len(rule.ResourceNames) > 0 {
		text += " named `" + strings.Join(rule.ResourceNames, "`, `") + "`"
	}
	return text
}

// renderAll renders the chart with all that is off by default switched on.
func renderAll(t *testing.T) []unstructured.Unstructured {
	t.Helper()
	return render(t, "k8slan-system", "limits.vniRange={1000,1999}", "limits.underlayDevices={eth1}",
		"uninstall.removeLANs=true", "evpn.enabled=true")
}
