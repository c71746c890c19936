{{- define "k8slan.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "k8slan.labels" -}}
app.kubernetes.io/name: k8slan
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* The labels by which a workload finds its pods; takes the component's name. */ -}}
{{- define "k8slan.selector" -}}
app.kubernetes.io/name: k8slan
app.kubernetes.io/component: {{ . }}
{{- end }}

{{- /* Devices as a sentence has them; takes a list in which "" is the default route's. */ -}}
{{- define "k8slan.devices" -}}
{{- $names := list }}
{{- range . }}{{ $names = append $names (. | default "the default route's device") }}{{ end }}
{{- join ", " $names }}
{{- end }}
