/**
 * The system's own package sources, as sources.list(5) describes them: one-line files (`*.list`) and deb822 files
 * (`*.sources`). Only what is needed to reach the same mirror with the same keys is kept. Source packages, disabled
 * stanzas and other architectures are left out.
 */

export interface PackageSource {
  readonly uri: string;
  readonly suites: readonly string[];
  readonly components: readonly string[];
  /** Keyring file, or the text of an inline key; absent when the entry names none. */
  readonly signedBy?: string;
}

/** Reads a `*.list` file: `deb [option=value ...] URI SUITE COMPONENT...`. */
export function parseOneLine(text: string): PackageSource[] {
  const sources: PackageSource[] = [];
  for (const line of text.split('\n')) {
    const match = /^\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)((?:\s+[^\s#]+)*)/.exec(line);
    if (match === null) continue;
    const [, options = '', uri, suite, components] = match;
    const signedBy = /(?:^|\s)signed-by=(\S+)/i.exec(options)?.[1];
    sources.push({
      uri,
      suites: [suite],
      components: words(components),
      ...(signedBy === undefined ? {} : { signedBy }),
    });
  }
  return sources;
}

/** Reads a `*.sources` file: stanzas of `Field: value`, with continuation lines. */
export function parseDeb822(text: string): PackageSource[] {
  const sources: PackageSource[] = [];
  for (const stanza of text.split(/\n\s*\n/)) {
    const fields = stanzaFields(stanza);
    if (!words(fields.get('types')).includes('deb')) continue;
    if (/^(no|false|0|off|disable)$/i.test(fields.get('enabled') ?? 'yes')) continue;
    const signedBy = fields.get('signed-by');
    for (const uri of words(fields.get('uris'))) {
      sources.push({
        uri,
        suites: words(fields.get('suites')),
        components: words(fields.get('components')),
        ...(signedBy === undefined ? {} : { signedBy }),
      });
    }
  }
  return sources;
}

/** The first source that has `suite` with component main, read over the network or from a mirror list. */
export function sourceOf(suite: string, sources: readonly PackageSource[]): PackageSource | undefined {
  return sources.find((s) => s.suites.includes(suite) && s.components.includes('main') && !s.uri.startsWith('cdrom:'));
}

function stanzaFields(stanza: string): Map<string, string> {
  const fields = new Map<string, string>();
  let name = '';
  for (const line of stanza.split('\n')) {
    if (line.startsWith('#')) continue;
    if (/^\s/.test(line)) {
      if (name !== '') fields.set(name, `${fields.get(name)}\n${line}`.trim());
      continue;
    }
    const colon = line.indexOf(':');
    if (colon < 1) continue;
    name = line.slice(0, colon).toLowerCase();
    fields.set(name, line.slice(colon + 1).trim());
  }
  return fields;
}

function words(text = ''): string[] {
  return text.split(/\s+/).filter((word) => word !== '');
}
