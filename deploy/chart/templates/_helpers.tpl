{{- define "router.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "router.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "router.labels" -}}
{{ include "router.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "router.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "router.name" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* The router's file: what the values say, and what the pod decides. */}}
{{- define "router.file" -}}
{{- if not .Values.config.replicas -}}
{{- fail "config.replicas is empty: name at least one engine, with its url and its hardware or rates" -}}
{{- end -}}
{{- $config := deepCopy .Values.config -}}
{{- $listen := merge (dict "host" "0.0.0.0" "port" .Values.containerPort) ($config.listen | default dict) -}}
{{- $log := merge ($config.log | default dict) (dict "format" "json") -}}
{{- $_ := set $config "listen" $listen -}}
{{- $_ := set $config "log" $log -}}
{{- if .Values.keysSecret -}}
{{- $_ := set $config "auth" (merge (dict "keys_file" "/etc/servegym/keys/keys.yaml") ($config.auth | default dict)) -}}
{{- end -}}
{{ toYaml $config }}
{{- end -}}
